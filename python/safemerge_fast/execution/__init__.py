"""Stage 6, execution: plans become files of an output in a job's directory; inputs are watched meanwhile."""
