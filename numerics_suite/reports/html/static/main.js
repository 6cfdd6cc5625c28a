startTheme();
startCopying();
startFilter(startMap());
startPlots();
