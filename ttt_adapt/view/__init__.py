"""What people see: pictures of predictions and reconstructions, and progress in the terminal."""
