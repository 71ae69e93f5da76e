"""The queue on Redis: connections, messages, answers, retention, maintenance and queue sizes."""
