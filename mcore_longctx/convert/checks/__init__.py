"""Looking at checkpoints: compared, described, checked for those who will serve them."""
