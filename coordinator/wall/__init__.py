"""Smart plugs as the wall meters of rounds: hearing them, keeping what they say, joining it to updates."""
