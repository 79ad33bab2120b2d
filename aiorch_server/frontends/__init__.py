"""The doors: each turns one wire protocol into calls of the data plane and the control plane, and back."""
