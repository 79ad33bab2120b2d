"""Framework executors of AIOrchestrator, one folder each."""
