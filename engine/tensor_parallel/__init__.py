"""One model over several processes, a share of its heads in each."""
