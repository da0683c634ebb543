# The library of the CUDA kernels, where a CUDA compiler is found or asked for. nvcc decides, not a
# GPU: wheels are built on machines without one.

# From "8.0 9.0a 12.0+PTX" (blanks or semicolons) to "80-real;90a-real;120" in `result`.
function(dk_architectures arch_list result)
  string(REGEX REPLACE "[ ,;]+" ";" entries "${arch_list}")
  list(FILTER entries EXCLUDE REGEX "^$")
  set(architectures "")
  foreach(entry IN LISTS entries)
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: got '${entry}', expected entries like 8.0, 9.0a or 12.0+PTX")
    endif()
    if(CMAKE_MATCH_1 LESS 8)
      # Images of NVIDIA set a list for all of PyTorch; ours is what we have kernels for.
      message(STATUS "TORCH_CUDA_ARCH_LIST: ${entry} is left out, the kernels need 8.0 or newer")
    elseif(CMAKE_MATCH_4)
      list(APPEND architectures "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
    else()
      list(APPEND architectures "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}-real")
    endif()
  endforeach()
  list(REMOVE_DUPLICATES architectures)
  if(NOT architectures)
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: got '${arch_list}', expected at least one of 8.0 or newer")
  endif()
  set(${result} "${architectures}" PARENT_SCOPE)
endfunction()

if(DICEKERNELS_BUILD STREQUAL "cpu")
  return()
endif()

# In this order: CUDACXX, the toolkit that PyTorch's own builds take, PATH.
foreach(variable CUDA_HOME CUDA_PATH)
  if(NOT DEFINED ENV{CUDACXX} AND EXISTS "$ENV{${variable}}/bin/nvcc")
    set(ENV{CUDACXX} "$ENV{${variable}}/bin/nvcc")
  endif()
endforeach()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(DICEKERNELS_BUILD STREQUAL "cuda")
    message(FATAL_ERROR "DICEKERNELS_BUILD=cuda, but no CUDA compiler works here; expected nvcc of CUDA 12 or newer "
                        "on PATH or in $CUDA_HOME/bin: install the toolkit, or set DICEKERNELS_BUILD=cpu")
  endif()
  message(STATUS "no CUDA compiler (nvcc on PATH or in $CUDA_HOME/bin): CPU only")
  # Forgotten, so that one that is installed later is found in this build folder.
  unset(CMAKE_CUDA_COMPILER CACHE)
  return()
endif()
# The architectures are set below, when the version of nvcc is known; OFF keeps CMake from choosing.
set(CMAKE_CUDA_ARCHITECTURES OFF)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

set(DK_ARCH_LIST "${DICEKERNELS_ARCH_LIST}")
if(NOT DK_ARCH_LIST)
  set(DK_ARCH_LIST "8.0 9.0 10.0 12.0+PTX")
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    set(DK_ARCH_LIST "8.0 9.0+PTX")
  endif()
endif()
dk_architectures("${DK_ARCH_LIST}" DK_ARCHITECTURES)
message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${DK_ARCHITECTURES}")

# Machine code of every architecture comes from the PTX of the oldest one, whose features are all that
# the kernels use: that saves a third of the time, most of it the compiler's before the assembler.
set(codes "")
set(oldest 9999)
set(DK_GENCODE "")
foreach(architecture IN LISTS DK_ARCHITECTURES)
  string(REGEX REPLACE "-real$" "" number "${architecture}")
  if(number MATCHES "[af]$")
    list(APPEND DK_GENCODE "--generate-code=arch=compute_${number},code=sm_${number}")
  else()
    list(APPEND codes "sm_${number}")
    if(number LESS oldest)
      set(oldest ${number})
    endif()
  endif()
  if(NOT architecture MATCHES "-real$")
    list(APPEND DK_GENCODE "--generate-code=arch=compute_${number},code=compute_${number}")
  endif()
endforeach()
if(codes)
  string(REPLACE ";" "," codes "${codes}")
  list(APPEND DK_GENCODE "--generate-code=arch=compute_${oldest},code=[${codes}]")
endif()

# The kernels include no header of torch: four architectures then compile in a quarter of the time.
set(DK_CUDA_FLAGS -O3 --expt-relaxed-constexpr -Werror=all-warnings
  -Xcompiler=-fvisibility=hidden,-Wall,-Wextra,-Werror)
function(dk_cuda_kernels name)
  list(TRANSFORM ARGN PREPEND "${CMAKE_SOURCE_DIR}/csrc/")
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE "${CMAKE_SOURCE_DIR}/csrc")
  target_compile_options(${name} PRIVATE ${DK_CUDA_FLAGS} ${DK_GENCODE} "-Xcompiler=-fmacro-prefix-map=${CMAKE_SOURCE_DIR}/=")
  set_target_properties(${name} PROPERTIES
    CUDA_ARCHITECTURES OFF CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF)
endfunction()

add_library(dicekernels_cuda MODULE csrc/cuda/ops.cpp)
dk_cuda_kernels(dk_cuda_kernels ${DK_CUDA_KERNELS})
target_sources(dicekernels_cuda PRIVATE $<TARGET_OBJECTS:dk_cuda_kernels>)
foreach(element IN LISTS DK_ELEMENTS)
  dk_cuda_kernels(dk_cuda_${element} ${DK_ELEMENT_KERNELS})
  target_compile_definitions(dk_cuda_${element} PRIVATE DK_ELEMENT=${element})
  target_sources(dicekernels_cuda PRIVATE $<TARGET_OBJECTS:dk_cuda_${element}>)
endforeach()
# Linked by the C++ compiler: nvcc would add a stub for an architecture that nobody asked for. The
# static runtime lets one library run beside the CUDA 12 and CUDA 13 builds of torch.
target_link_libraries(dicekernels_cuda PRIVATE dk_options stdc++
  "${DICEKERNELS_TORCH_DIR}/lib/libtorch_cpu.so" CUDA::cudart_static)
target_link_options(dicekernels_cuda PRIVATE -Wl,-z,defs -Wl,--exclude-libs,ALL)
# What dicekernels/dispatch.py asks the library for; between semicolons each would be a definition.
list(JOIN DK_ARCHITECTURES "," listed)
target_compile_definitions(dicekernels_cuda PRIVATE "DK_ARCHITECTURES=\"${listed}\"")
set_target_properties(dicekernels_cuda PROPERTIES LINKER_LANGUAGE CXX)
install(TARGETS dicekernels_cuda LIBRARY DESTINATION dicekernels)
