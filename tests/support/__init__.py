"""Real servers, pictures and waiting, for tests, demo and benchmarks alike. Nothing here knows pytest."""
