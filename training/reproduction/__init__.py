"""The paper's tables and figures, measured on the bases and data that we have."""
