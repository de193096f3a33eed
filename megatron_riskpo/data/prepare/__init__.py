"""`riskpo data prepare`: data sets as their owners publish them into question files."""
