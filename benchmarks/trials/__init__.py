"""What sharing makes of many plans in one study, and one step of many members."""
