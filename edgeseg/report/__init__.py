"""Reports of measured rows: terminal, Markdown, CSV, JSON and one self-contained HTML file."""
