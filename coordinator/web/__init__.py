"""Page, API and event stream of the coordinator."""
