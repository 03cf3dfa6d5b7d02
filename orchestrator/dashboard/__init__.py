"""The dashboard: pages in a browser, on the same services as the REST API. Nothing here reads a table.

mount.py     what the API mounts: login, headers, and NiceGUI, which is loaded with the first visit
feeds.py     one reader of each view for however many pages show it
frame.py     what every page has: navigation, theme, messages, whoever is logged in
parts.py     headings, chips, tables: the words of the pages
pages/       one module for each page
"""
