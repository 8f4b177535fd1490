"""Reading model files: shapes first, without touching a weight; then weights, one tensor at a time."""
