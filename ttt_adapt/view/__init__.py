"""What people see: pictures, overlays and progress."""
