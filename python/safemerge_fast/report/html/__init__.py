"""The report as one HTML file: what was measured and decided, and what another rule would do."""
