"""Records of what was measured, from which pages, tables and figures are drawn."""
