"""The admin services: registry, deployments, tuning, access and audit over gRPC; imported where there is a registry."""
