"""The programs that Sluice is measured beside, other than the plain relay."""
