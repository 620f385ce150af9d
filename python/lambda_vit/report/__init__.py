"""Reports: records of what was measured, and their pages, tables and figures."""
