"""Stage 7, report: what happened, as JSON, table, model card and plot."""
