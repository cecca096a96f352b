"""Who may take part: invitations, devices' keys, and the files that tell the broker."""
