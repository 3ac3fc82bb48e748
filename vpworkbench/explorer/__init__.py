"""See and touch attention masks, live in JupyterLab."""
