"""One module per backend: the same three ops (sums, finish, sums_backward) on each."""
