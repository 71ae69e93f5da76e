"""Everything that both sides exchange with Redis: connections, messages, answers, retention, maintenance, queues."""
