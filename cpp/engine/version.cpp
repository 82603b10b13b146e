#include <tda/version.h>

std::string_view tda::version() { return TDA_VERSION; }
