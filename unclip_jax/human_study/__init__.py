"""Human evaluation as in the paper (section 5.2, appendix B): a page that asks people, and what their answers say."""
