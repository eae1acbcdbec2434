"""What lies beside the weights in an output directory."""
