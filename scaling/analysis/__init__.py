"""What runs say together: efficiency, rankings, lost time, fits."""
