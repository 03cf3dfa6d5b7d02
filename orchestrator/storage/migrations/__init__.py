"""Schema revisions, run by `Database.upgrade`. A released revision is never edited."""
