"""Room 5: instances that pull batches and run them through a backend."""
