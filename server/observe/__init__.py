"""What people watch the server by: metrics, logs and traces."""
