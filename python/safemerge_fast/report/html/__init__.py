"""The report as one HTML file that loads nothing else: what was measured, what was decided, and what another rule would do."""
