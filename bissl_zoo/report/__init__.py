"""One HTML file on a run, on several side by side, or on a zoo."""

#: what the report of one run is called, in its directory
REPORT_FILE = "report.html"
#: images of a data set that a report on demand looks at
IMAGES = 500
