"""Reports for readers, made from the JSON of one run or several: Markdown, a matrix for a README, an HTML page."""
