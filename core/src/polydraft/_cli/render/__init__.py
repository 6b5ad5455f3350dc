"""What the commands show. Nothing here decides anything; nothing else writes."""
