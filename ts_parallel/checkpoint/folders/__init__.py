"""What people's folders are: which of their files hold the weights, whose names those have, and what cannot be read."""
