"""What the papers do to a plan or to the loss, as functions of runs: no token is read."""
