"""Plans and runs: what is computed in which rows, and the waves that compute it."""
