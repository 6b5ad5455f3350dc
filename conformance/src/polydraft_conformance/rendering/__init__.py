"""Reports for readers, made from the JSON of one or several runs: Markdown, a matrix for a README, an HTML page."""
