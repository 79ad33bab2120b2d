"""Room 3: which model versions live, how they come and go, and who holds them."""
