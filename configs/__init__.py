"""The language of Patchwork: job descriptions, wire models, reasons and the cost model. Pure Python, no framework."""
