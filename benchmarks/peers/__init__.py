"""How the packages that we are measured against are prepared; nothing of them is committed."""
