"""What calls, links and steps cost, observed: seconds, workspace, aliasing, exact peaks."""
