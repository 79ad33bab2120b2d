"""What should run of each model, the way from one version to the next, and the part that makes it so on this server."""
