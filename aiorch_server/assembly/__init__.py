"""How the parts of a server are built from its configuration, one module per group; ``app`` starts and stops them."""
