"""spd-fast inside other systems; each module imports its own, so nothing is loaded here."""
