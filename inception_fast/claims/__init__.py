"""The study of what the literature claims: each claim beside what this machine measured, and by which command."""
