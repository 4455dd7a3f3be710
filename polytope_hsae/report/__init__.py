"""One self-contained report.html per finished run; `build.write_report` makes it."""
