"""Messages and methods of the served protocols, for clients and servers."""
