"""The processes of a launch: how they start, meet, stop and end."""
